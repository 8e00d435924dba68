"""From a folder of text to a served model: the files on the way, and the program that makes each of the one before."""

from figures.canvas import COLOURS, arrow, box, canvas, write

WORDS = {
    "en": ("your texts\n.txt .md .jsonl", "clean rows\npretrain.jsonl", "base model\npretrain_*.pth",
           "chat model\nfull_sft_*.pth", "your conversations\nchats.jsonl", "held-out rows", "held-out questions",
           "terminal", "server", "export"),
    "zh": ("你的文本\n.txt .md .jsonl", "干净的行\npretrain.jsonl", "基座模型\npretrain_*.pth",
           "对话模型\nfull_sft_*.pth", "你的对话\nchats.jsonl", "留出的行", "留出的问题", "终端", "服务", "导出"),
}  # fmt: skip


def draw(language: str):
    texts, rows, base, chat, own, held_rows, held_questions, terminal, server, export = WORDS[language]
    figure, axes = canvas(860, 290)

    def step(start, end, program):
        arrow(axes, start, end)
        write(axes, (start[0] + end[0]) / 2, start[1] - 12, program, 7)

    for i, (text, colour) in enumerate(((texts, 5), (rows, 0), (base, 2), (chat, 1))):
        box(axes, 12 + 205 * i, 90, 120, 50, text, COLOURS[colour], 8)
    for i, program in enumerate(("data_process.py", "1-pretrain.py", "3-full_sft.py")):
        step((134 + 205 * i, 115), (215 + 205 * i, 115), program)
    box(axes, 422, 10, 140, 44, own, COLOURS[5], 8)
    arrow(axes, (564, 32), (660, 88))
    box(axes, 227, 190, 100, 30, held_rows, size=8)
    box(axes, 422, 190, 120, 30, held_questions, size=8)
    arrow(axes, (277, 142), (277, 188))
    arrow(axes, (329, 198), (420, 142))
    write(axes, 352, 236, "0-eval_pretrain.py --score", 7)
    arrow(axes, (544, 198), (640, 142))
    write(axes, 560, 236, "2-eval.py --questions", 7)
    for i, (text, program) in enumerate(
        ((terminal, "2-eval.py"), (server, "serve_openai_api.py"), (export, "export_model.py"))
    ):
        box(axes, 762, 40 + 70 * i, 84, 34, text, COLOURS[4], 8)
        arrow(axes, (749, 115), (760, 57 + 70 * i))
        write(axes, 804, 84 + 70 * i, program, 6.5)
    return figure
