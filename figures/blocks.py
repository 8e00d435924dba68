"""The whole model and one layer of it, dense and with experts: shapes and parameter counts read off real modules."""

from figures.canvas import COLOURS, INK, PALE, arrow, box, canvas, write

PRESETS = ("minimind2-small", "minimind2-moe")
WORDS = {
    "en": {"ids": "token ids", "embedding": "embedding", "layers": "layers", "norm": "final RMSNorm",
           "head": "head (tied)",
           "attention": "attention (GQA)", "dense": "SwiGLU", "moe": "router, {k} of {e} experts\n+ {s} shared",
           "stream": "residual stream", "all": "parameters: {all}", "active": "of these a token meets {active}",
           "again": "same as embedding"},
    "zh": {"ids": "token 编号", "embedding": "嵌入 embedding", "layers": "层", "norm": "最后的 RMSNorm",
           "head": "输出头（共享权重）", "attention": "注意力（GQA）", "dense": "SwiGLU 前馈",
           "moe": "路由器，{e} 个专家选 {k} 个\n外加 {s} 个共享专家",
           "stream": "残差流", "all": "参数量：{all}", "active": "一个 token 用到其中 {active}",
           "again": "与嵌入同一个矩阵"},
}  # fmt: skip
NAMES = {"minimind2-small": "Dense: minimind2-small", "minimind2-moe": "MoE: minimind2-moe"}


def parameters(module) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,}"


def draw(language: str):
    import torch

    from model.LMConfig import LMConfig
    from model.model import MiniMindForCausalLM

    figure, axes = canvas(860, 640)
    for column, preset in enumerate(PRESETS):
        config = LMConfig.from_preset(preset)
        with torch.device("meta"):  # shapes without numbers: nothing is allocated or drawn
            model = MiniMindForCausalLM(config)
        draw_model(axes, 20 + 430 * column, NAMES[preset], config, model, WORDS[language])
    return figure


def draw_model(axes, x: float, name: str, config, model, words: dict):
    decoder, layer, D = model.model, model.model.layers[0], config.dim
    middle = x + 140  # where the stream runs
    write(axes, x + 195, 20, name, 11, weight="bold")

    def block(y, height, text, colour, beside):
        box(axes, middle - 110, y, 220, height, text, colour)
        for i, line in enumerate(beside):
            write(axes, middle + 122, y + height / 2 + (i - (len(beside) - 1) / 2) * 17, line, 8, align="left")

    block(44, 26, words["ids"], PALE, ["(B, T)"])
    arrow(axes, (middle, 70), (middle, 90))
    block(90, 30, words["embedding"], COLOURS[5], [f"{config.vocab_size:,} × {D}", parameters(decoder.embed_tokens)])
    arrow(axes, (middle, 120), (middle, 176))
    write(axes, middle + 10, 134, f"{words['stream']} (B, T, {D})", 8, align="left")

    box(axes, x, 150, 280, 310, "", "#ffffff")
    write(axes, x + 288, 162, f"× {config.n_layers} {words['layers']}", 9, align="left", weight="bold")
    write(axes, x + 288, 180, parameters(layer), 8, align="left")
    feed_forward = words["dense"]
    if config.use_moe:
        feed_forward = words["moe"].format(
            k=config.num_experts_per_tok, e=config.n_routed_experts, s=config.n_shared_experts
        )
    heads = f"{config.n_heads} Q, {config.n_kv_heads} KV × {config.head_dim}"
    width = config.moe_hidden_dim if config.use_moe else config.hidden_dim
    branch(axes, x, 170, layer.input_layernorm, words["attention"], COLOURS[0], layer.self_attn, heads)
    branch(axes, x, 316, layer.post_attention_layernorm, feed_forward, COLOURS[1], layer.mlp, f"{D} → {width} → {D}")
    arrow(axes, (middle, 456), (middle, 486))

    block(486, 26, words["norm"], COLOURS[4], [parameters(decoder.norm)])
    arrow(axes, (middle, 512), (middle, 530))
    block(530, 30, words["head"], COLOURS[5], [f"{D} × {config.vocab_size:,}", words["again"]])
    arrow(axes, (middle, 560), (middle, 578))
    write(axes, middle, 588, f"logits (B, T, {config.vocab_size:,})", 8.5)
    total, active = f"{config.parameter_count():,}", f"{config.active_parameter_count():,}"
    write(axes, x + 195, 610, words["all"].format(all=total), 9, weight="bold")
    if config.use_moe:
        write(axes, x + 195, 628, words["active"].format(active=active), 8.5)


def branch(axes, x: float, y: float, norm, name: str, colour: str, module, shapes: str):
    """One update: the stream goes straight down on the left, its copy through norm and block, and is added again."""
    stream, side = x + 30, x + 60
    middle = x + 140
    axes.plot([middle, stream, stream, middle - 9], [y + 4, y + 4, y + 130, y + 130], color=INK, lw=2)
    arrow(axes, (middle, y + 4), (middle, y + 16))
    box(axes, side, y + 16, 160, 24, "RMSNorm", COLOURS[4], 8.5)
    write(axes, side + 168, y + 28, parameters(norm), 8, align="left")
    arrow(axes, (middle, y + 40), (middle, y + 52))
    box(axes, side, y + 52, 160, 46, name, colour, 8.5)
    write(axes, x + 288, y + 67, shapes, 8, align="left")
    write(axes, x + 288, y + 84, parameters(module), 8, align="left")
    arrow(axes, (middle, y + 98), (middle, y + 122))
    from matplotlib.patches import Circle

    axes.add_patch(Circle((middle, y + 130), 9, fc="#ffffff", ec=INK, lw=1.2))
    write(axes, middle, y + 130, "+", 11)
    axes.plot([middle, middle], [y + 139, y + 150], color=INK, lw=2)
