"""The stages from raw text to a model that answers, with what goes in and what comes out of each."""

from figures.canvas import COLOURS, arrow, box, canvas, write

STAGES = [  # script, then in each language: the name, what goes in, what comes out
    ("scripts/train_tokenizer.py", {"en": ("tokenizer", "text", "vocabulary and merges"),
                                    "zh": ("分词器", "文本", "词表与合并表")}),
    ("1-pretrain.py", {"en": ("pretraining", "much text", "base model: continues text"),
                       "zh": ("预训练", "大量文本", "基座模型：会续写")}),
    ("3-full_sft.py", {"en": ("fine-tuning (SFT)", "conversations", "chat model: answers"),
                       "zh": ("监督微调 SFT", "对话", "对话模型：会回答")}),
    ("5-dpo_train.py", {"en": ("preferences (DPO)", "good and bad answers", "prefers the better answer"),
                        "zh": ("偏好对齐 DPO", "好答案与差答案", "更偏向好的回答")}),
    ("train_grpo.py", {"en": ("reinforcement (GRPO)", "questions that can be checked", "right more often"),
                       "zh": ("强化学习 GRPO", "可以判对错的问题", "答对的次数变多")}),
]  # fmt: skip
HEADS = {"en": ("what goes in", "stage and its script", "what comes out"), "zh": ("输入", "阶段与脚本", "输出")}


def draw(language: str):
    figure, axes = canvas(720, 36 + 84 * len(STAGES))
    for x, head in zip((110, 360, 605), HEADS[language], strict=True):
        write(axes, x, 24, head, 10, weight="bold")
    for i, (script, words) in enumerate(STAGES):
        name, goes_in, comes_out = words[language]
        y = 48 + 84 * i
        box(axes, 20, y + 8, 180, 40, goes_in)
        box(axes, 250, y, 220, 56, f"{name}\n{script}", COLOURS[i % len(COLOURS)])
        box(axes, 520, y + 8, 180, 40, comes_out)
        arrow(axes, (200, y + 28), (250, y + 28))
        arrow(axes, (470, y + 28), (520, y + 28))
        if i + 1 < len(STAGES):
            arrow(axes, (360, y + 56), (360, y + 84))
    return figure
