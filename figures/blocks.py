"""The whole model and one layer of it, dense and with experts: shapes and parameter counts read off real modules."""

from figures.canvas import COLOURS, INK, PALE, arrow, box, canvas, write

PRESETS = {"minimind2-small": "Dense: minimind2-small", "minimind2-moe": "MoE: minimind2-moe"}
WORDS = {
    "en": {"ids": "token ids", "embedding": "embedding", "layers": "{} layers, each", "norm": "final RMSNorm",
           "head": "head", "attention": "attention (GQA)", "dense": "SwiGLU", "experts": "router: {k} of {e} experts",
           "shared": "+ {s} shared", "heads": "{H} query heads, {G} KV", "stream": "residual stream",
           "all": "{} parameters", "active": "a token meets {} of them", "again": "the embedding's matrix"},
    "zh": {"ids": "token 编号", "embedding": "嵌入 embedding", "layers": "共 {} 层，每层", "norm": "最后的 RMSNorm",
           "head": "输出头 head", "attention": "注意力（GQA）", "dense": "SwiGLU 前馈",
           "experts": "路由器：{e} 个专家选 {k} 个", "shared": "外加 {s} 个共享专家",
           "heads": "{H} 个查询头，{G} 个 KV 头", "stream": "残差流", "all": "参数量 {}",
           "active": "一个 token 用到其中 {}", "again": "与嵌入同一个矩阵"},
}  # fmt: skip
COLUMN, LEFT, STREAM = 420, 20, 40  # width of a model's column; where it begins; where in it the stream runs


def parameters(module) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,}"


def draw(language: str):
    import torch

    from model.LMConfig import LMConfig
    from model.model import MiniMindForCausalLM

    figure, axes = canvas(COLUMN * len(PRESETS), 640)
    for column, (preset, name) in enumerate(PRESETS.items()):
        config = LMConfig.from_preset(preset)
        with torch.device("meta"):  # shapes without numbers: nothing is allocated or drawn
            model = MiniMindForCausalLM(config)
        x = LEFT + COLUMN * column
        write(axes, x, 20, name, 11, align="left", weight="bold")
        draw_model(axes, x, config, model, WORDS[language])
    return figure


def draw_model(axes, x: float, config, model, words: dict):
    decoder, layer, D = model.model, model.model.layers[0], config.dim
    stream = x + STREAM

    def block(y, text, colour, *beside):
        box(axes, x, y, 190, 30, text, colour)
        notes(axes, x + 200, y + 15, *beside)

    block(40, words["ids"], PALE, "(B, T)")
    arrow(axes, (stream, 70), (stream, 88))
    block(88, words["embedding"], COLOURS[5], f"{config.vocab_size:,} × {D}", parameters(decoder.embed_tokens))
    write(axes, stream + 12, 132, f"{words['stream']} (B, T, {D})", 8.5, align="left")

    box(axes, x, 146, 240, 318, "", "#ffffff")
    notes(axes, x + 250, 162, words["layers"].format(config.n_layers), parameters(layer))
    axes.plot([stream, stream], [118, 486], color=INK, lw=3, zorder=2)  # straight through: the residual stream
    heads = words["heads"].format(H=config.n_heads, G=config.n_kv_heads)
    attention = [heads, f"{D} → {config.head_dim} × {config.n_heads} → {D}", parameters(layer.self_attn)]
    branch(axes, x, 160, layer.input_layernorm, words["attention"], COLOURS[0], attention)
    if config.use_moe:
        counts = {"k": config.num_experts_per_tok, "e": config.n_routed_experts, "s": config.n_shared_experts}
        name = words["experts"].format(**counts) + "\n" + words["shared"].format(**counts)
        width = config.moe_hidden_dim
    else:
        name, width = words["dense"], config.hidden_dim
    shapes = [f"{D} → {width} → {D}", parameters(layer.mlp)]
    branch(axes, x, 312, layer.post_attention_layernorm, name, COLOURS[1], shapes)
    arrow(axes, (stream, 470), (stream, 490), INK)

    block(490, words["norm"], COLOURS[4], f"{parameters(decoder.norm)}")
    arrow(axes, (stream, 520), (stream, 538))
    block(538, words["head"], COLOURS[5], f"{D} × {config.vocab_size:,}", words["again"])
    arrow(axes, (stream, 568), (stream, 586))
    write(axes, stream - 20, 597, f"logits (B, T, {config.vocab_size:,})", 9, align="left")
    total = words["all"].format(f"{config.parameter_count():,}")
    write(axes, x, 624, total, 10, align="left", weight="bold")
    if config.use_moe:
        write(axes, x + 200, 624, words["active"].format(f"{config.active_parameter_count():,}"), 8.5, align="left")


def notes(axes, x: float, y: float, *lines: str):
    for i, line in enumerate(lines):
        write(axes, x, y + (i - (len(lines) - 1) / 2) * 17, line, 8, align="left")


def branch(axes, x: float, y: float, norm, name: str, colour: str, beside: list[str]):
    """One update: it reads the stream, goes through norm and block, and is added to the stream."""
    from matplotlib.patches import Circle

    stream, middle = x + STREAM, x + 155
    axes.plot([stream, middle], [y + 6, y + 6], color=INK, lw=1.2)
    arrow(axes, (middle, y + 6), (middle, y + 22), INK)
    box(axes, x + 80, y + 22, 150, 24, "RMSNorm", COLOURS[4], 8.5)
    notes(axes, x + 250, y + 34, parameters(norm))
    arrow(axes, (middle, y + 46), (middle, y + 60), INK)
    box(axes, x + 80, y + 60, 150, 50, name, colour, 8)
    notes(axes, x + 250, y + 85, *beside)
    axes.plot([middle, middle], [y + 110, y + 132], color=INK, lw=1.2)
    arrow(axes, (middle, y + 132), (stream + 9, y + 132), INK)
    axes.add_patch(Circle((stream, y + 132), 9, fc="#ffffff", ec=INK, lw=1.2, zorder=3))
    write(axes, stream, y + 132, "+", 11, zorder=4)
