"""The words of the frame and of the chat page: (Chinese, English)."""

CHAT = {
    # the frame
    "chat": ("聊天", "Chat"),
    "look": ("看进模型", "Look inside"),
    "watch": ("训练", "Watch"),
    "data": ("数据", "Data"),
    "or": ("或者", "or"),
    "details": ("程序的原话", "The program's own words"),
    "loading": ("正在加载……", "Loading …"),
    "untrained": (
        "out/ 里还没有模型。先训练一个：`make demo`（几分钟，自带样例数据）；也可以在左侧选择“API 地址”。",
        "There is no model in out/ yet. Train one first: `make demo` takes minutes, on the sample that comes with the "
        "project. Or choose “an API address” on the left.",
    ),
    # what an error means and what to do
    "fault_other": ("出错了：{text}", "This went wrong: {text}"),
    "fault_too_long": (
        "这段对话有 {tokens} 个 token，模型的上下文只有 {context}。请缩短问题，或减少记住的轮数。",
        "The chat has {tokens} tokens, and the model's context holds {context}. Shorten the question, or remember "
        "fewer exchanges.",
    ),
    "fault_text_too_long": (
        "这段文字有 {tokens} 个 token，最多能看 {most} 个。请取其中一段。",
        "The text has {tokens} tokens, and {most} at most can be looked at. Take a part of it.",
    ),
    "fault_unreachable": (
        "{address} 没有应答。请检查地址，并先启动服务：`python scripts/serve_openai_api.py`",
        "Nothing answers at {address}. Check the address, and start the server first: "
        "`python scripts/serve_openai_api.py`",
    ),
    "fault_refused": (
        "{address} 拒绝了请求。请检查密钥和模型名；如果服务繁忙，过一会儿再试。",
        "{address} refuses the request. Check the key and the model; where it is busy, try again later.",
    ),
    "fault_no_api": (
        "{address} 的应答不是 OpenAI 接口的格式。地址通常以 /v1 结尾。",
        "{address} does not answer as OpenAI's API does. Such an address usually ends in /v1.",
    ),
    "fault_no_client": (
        "要使用 API 地址，请先安装：`pip install openai`",
        "An API address needs OpenAI's client: `pip install openai`",
    ),
    "fault_adapter": (
        "这是训练在 {base} 之上的适配器，而那个文件不在了。请把它放回原处，或选别的模型。",
        "This adapter belongs to the weights {base}, and they are gone. Put that file back, or choose another model.",
    ),
    "fault_tokenizer": (
        "这个权重文件没有与它相配的分词器。请选别的模型，或用本项目的脚本重新保存。",
        "These weights come without a tokenizer that fits. Choose another model.",
    ),
    "fault_weights": (
        "{file} 读不出来：文件可能不完整，或不是权重文件。请选别的模型，或重新训练它。",
        "{file} cannot be read: it may be incomplete, or no weights file. Choose another model, or train it again.",
    ),
    "fault_form": (
        "回答的形式不能用：请检查左侧的 JSON Schema 或选项。在改好之前，回答的形式不受限制。",
        "This form cannot be used: check the JSON schema or the choices on the left. Until then answers are free.",
    ),
    "fault_no_grammar": (
        "限定回答的形式需要先安装：`pip install llguidance`",
        "Answers of a given form need a package: `pip install llguidance`",
    ),
    "fault_not_a_chat": (
        "这个文件不是聊天记录。请选用本页“导出”得到的 JSON。",
        "This file is not a chat. Take a JSON file that “Export” on this page has written.",
    ),
    "fault_empty_text": ("还没有文字。请先写一段。", "There is no text yet. Write one first."),
    "fault_vocabularies": (
        "两个模型的词表不同，读到的 token 不一样，因此不能逐个比较。请选同一个底座训练出来的模型。",
        "The two models have different vocabularies and read different tokens, so these cannot be compared. Choose "
        "models that were trained from one base.",
    ),
    "fault_file_line": (
        "{file} 第 {line} 行读不懂。请改正这一行；`python data_process.py clean` 能整理各种格式。",
        "Line {line} of {file} cannot be used. Correct it; `python data_process.py clean` brings other forms into "
        "shape.",
    ),
    "fault_no_rows": ("{file} 里没有可用的数据行。请选别的文件。", "{file} holds no usable rows. Choose another file."),
    "fault_no_folder": (
        "没有 {folder} 这个文件夹。训练会写出一个；也可以填别的路径。",
        "There is no folder {folder}. Training writes one; or name another.",
    ),
    # chat: the frame of a conversation
    "mode": ("用法", "Mode"),
    "talk": ("对话", "Talk"),
    "compare": ("比较两个模型", "Compare two"),
    "continue": ("续写", "Continue a text"),
    "chat_title": ("和你训练的模型聊聊", "Talk to the model you trained"),
    "can_ask": ("它学过的问题，例如：", "It was taught questions like these:"),
    "can_base": (
        "这是预训练得到的底座模型：它会续写，没有学过问答。请用上面的“续写”，或在左侧选一个微调过的模型。",
        "This is a base model: it continues texts and was taught no questions. Use “Continue a text” above, or choose "
        "a fine-tuned model on the left.",
    ),
    "chats": ("聊天记录", "Chats"),
    "new_chat": ("新聊天", "New chat"),
    "import": ("导入", "Import"),
    "import_help": ("“导出”得到的 JSON，或 OpenAI 格式的消息", "A JSON file from “Export”, or OpenAI's messages"),
    "ask": ("说点什么……", "Say something …"),
    "stop": ("停止", "Stop"),
    "again": ("重新回答", "Regenerate"),
    "clear": ("清空", "Clear"),
    "export": ("导出", "Export"),
    "copy": ("复制", "Copy"),
    "edit": ("改问题", "Edit"),
    "edit_help": (
        "改好后会在一个新聊天里重新回答，原来的聊天保持不变。",
        "The answer goes into a new chat; this one stays as it is.",
    ),
    "send": ("发送", "Send"),
    # chat: under an answer
    "earlier": ("之前的回答", "Earlier answers"),
    "thought": ("思考过程", "Thinking"),
    "call": ("调用工具", "Tool call"),
    "stopped": ("（已停止）", "(stopped)"),
    "empty": ("模型没有写出任何内容就结束了", "the model ended without a word"),
    "empty_thinking": (
        "模型只写了思考，没有写回答；可以关掉思考，或增加 token 上限",
        "the model wrote thoughts and no answer; switch thinking off, or allow more tokens",
    ),
    "cut": ("到达 token 上限，回答被截断", "cut at the limit of tokens"),
    "broken": ("有 {n} 处字节不成字，已略去", "in {n} places its bytes made no character and are left out"),
    "counts": ("读 {read}，写 {written} 个 token", "{read} tokens read, {written} written"),
    "speed": ("{n} token/秒", "{n} tokens/s"),
    "rounds": ("模型一直在调用工具，到此为止。", "The model keeps calling tools; that is enough."),
    # chat: settings
    "source": ("模型来源", "Model from"),
    "here": ("本机 out/", "out/, here"),
    "api": ("API 地址", "an API address"),
    "model": ("模型", "Model"),
    "address": ("地址（OpenAI 兼容）", "Address (OpenAI-compatible)"),
    "key": ("密钥", "Key"),
    "system": ("系统提示", "System prompt"),
    "history": ("记住的对话轮数", "Exchanges remembered"),
    "no_turns": (
        "训练数据里几乎都是一问一答，所以每次只看当前的问题。",
        "Nearly all conversations it learned from have one question, so it sees the current one only.",
    ),
    "thinking": ("思考", "Thinking"),
    "no_thinking": ("训练数据里没有思考过程，它不会思考。", "Its data had no thinking, so it cannot think."),
    "free": ("由模型决定", "as the model likes"),
    "on": ("开", "on"),
    "off": ("关", "off"),
    "tools": ("工具", "Tools"),
    "no_tools": ("训练数据里没有工具调用，它不会用工具。", "Its data had no tool calls, so it cannot use tools."),
    "calculator": ("计算器", "calculator"),
    "clock": ("时钟", "clock"),
    "none": ("不用", "none"),
    "sampling": ("采样", "Sampling"),
    "max_tokens": ("最多生成的 token 数", "Tokens at most"),
    "temperature": ("温度（0：贪心）", "Temperature (0: greedy)"),
    "repetition_penalty": ("重复惩罚", "Repetition penalty"),
    "seed": ("随机种子（-1：每次不同）", "Seed (-1: a new one each time)"),
    "form": ("回答的形式", "Form of the answer"),
    "form_kind": ("形式", "Form"),
    "form_any": ("不限", "any"),
    "form_choice": ("几选一", "one of these"),
    "form_schema": ("JSON 对象", "JSON"),
    "form_choice_help": (
        "每行一个可能的回答。其余的 token 在采样时被挡住，模型只能写出其中一个。",
        "A possible answer a line. All other tokens are barred when one is drawn, so the model writes one of these.",
    ),
    "form_schema_help": (
        "JSON Schema：回答一定符合它，内容对不对仍由模型决定。",
        "A JSON schema: the answer is sure to match it; whether it is right is still up to the model.",
    ),
    # chat: compare, continue
    "compare_help": (
        "同一个问题、同样的设置，两个模型各答一遍：看看微调、LoRA 或 DPO 改变了什么。",
        "One question, the same settings, two models: see what fine-tuning, LoRA or DPO has changed.",
    ),
    "first": ("第一个模型", "First model"),
    "second": ("第二个模型", "Second model"),
    "question": ("问：", "Question: "),
    "continue_help": (
        "底座模型学的是续写：写一个开头，看它怎样接下去。",
        "A base model has learned to go on with a text: write a beginning and see.",
    ),
    "beginning": ("开头", "Beginning"),
    "go_on": ("接着写", "Go on"),
}
