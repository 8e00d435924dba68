"""What the terminal chat and scripts/demo.py say to a newcomer, in Chinese and in English.

The logs of the stages are English in every locale: people search for their words, and programs read them.
"""

from common import words

CATALOGUE: words.Catalogue = {
    # the chat's first lines
    "leave": (
        "退出：exit、quit、空行或 Ctrl-D。/clear 忘掉前面的对话，Ctrl-C 打断正在说的回答。",
        "To leave: exit, quit, an empty line or Ctrl-D. /clear forgets what was said, Ctrl-C stops an answer.",
    ),
    "base": (
        "这是基础模型：只会续写，没有学过回答问题。先微调它：python 3-full_sft.py",
        "This is a base model: it continues texts, and answers no questions. First fine-tune it: python 3-full_sft.py",
    ),
    "taught": ("学过：{forms}。", "It was taught: {forms}."),
    "not_taught": ("没有学过：{forms}。", "It was not taught: {forms}."),
    "and": ("、", ", "),
    "several_turns": ("多轮对话", "conversations of several questions"),
    "thinking": ("先思考再回答", "thinking before answers"),
    "tools": ("工具调用", "tool calls"),
    "examples": ("它学过的问题，例如：{questions}", "Questions it was taught, for example: {questions}"),
    "small": ("没学过的问题它也照样回答，但往往答错。", "It answers other questions too, and is often wrong."),
    # the demo
    "demo_tokenizer": ("训练分词器：文本怎样切成 token", "A tokenizer: how text is cut into tokens"),
    "demo_pretrain": ("预训练：学会预测下一个 token", "Pretraining: the model learns to predict the next token"),
    "demo_full_sft": ("微调：学会回答问题", "Fine-tuning: it learns to answer questions"),
    "demo_questions": ("提问：它没有训练过的问题，答对多少", "Questions it was not trained on, and how many are right"),
    "demo_talk": ("闲聊：它没有训练过的话，答得怎样", "Small talk it was not trained on"),
    "demo_exam": ("考试：比较选项的文字", "An exam, by the words of the options"),
    "demo_exam_letters": ("同一场考试：选字母", "The same exam, by letters"),
    "demo_dialogues": ("几段问答", "A few questions and answers"),
    "demo_stopped": ("已停下；再运行同一条命令，就从这里继续", "stopped; the same command goes on from here"),
    "demo_failed": ("`python {command}` 出错，退出码 {code}", "`python {command}` ended with exit code {code}"),
    "demo_next": (
        """
训练曲线：{out}/pretrain_160.png、{out}/full_sft_160.png    全部回答：{out}/answers.jsonl
接下来{first}：
  python 2-eval.py                                            在终端里和它聊天
  streamlit run scripts/web_demo.py                           在浏览器里聊天，看它怎样算出答案
  python 1-pretrain.py --data_path my_text.jsonl              用自己的文本预训练（每行 {{"text": ...}}）
  python 3-full_sft.py --data_path my_chats.jsonl             再用自己的对话微调
  python scripts/demo.py --fresh                              从头再来一遍
想弄懂每一步：docs/course/README_zh.md""",
        """
Curves: {out}/pretrain_160.png, {out}/full_sft_160.png    all answers: {out}/answers.jsonl
Next{first}:
  python 2-eval.py                                            chat with it
  streamlit run scripts/web_demo.py                           chat in the browser, and see how it finds its answers
  python 1-pretrain.py --data_path my_text.jsonl              pretrain on your own text ({{"text": ...}} a line)
  python 3-full_sft.py --data_path my_chats.jsonl             then on your own conversations
  python scripts/demo.py --fresh                              this again, from the beginning
To understand each step: docs/course/README.md""",
    ),
    "demo_activate": ("（先运行 `. .venv/bin/activate`）", " (after `. .venv/bin/activate`)"),
}


class Words(words.Words):
    """The terminal's words of one language."""

    catalogue = CATALOGUE
