"""How a conversation is written: the chat template, and the shapes in which conversations arrive.

    <|im_start|>user\\n1+1=?<|im_end|>\\n<|im_start|>assistant\\n<think>\\n...\\n</think>\\n\\n2<|im_end|>\\n

The format is ChatML (OpenAI 2023) with the think and tool blocks that Qwen3 and MiniMind 3 use. CHAT_TEMPLATE is for
every program that knows the Jinja templates of `transformers`; `render` in model/tokenizer.py does the same in Python.
"""

import json

ROLES = ("system", "user", "assistant", "tool")
TOOLS_HEAD = "# Tools\n\nFunctions you may call, one JSON signature a line:\n"
TOOLS_TAIL = "\n\nTo call one, answer with its name and arguments:\n"
TOOLS_EXAMPLE = '\n{"name": "...", "arguments": {...}}\n'

# The text of an assistant is trimmed at both ends, here and in render: after "assistant\n" a leading line end would
# merge with the header's ("\n\n" is one token), and the first learned token would begin before the answer does.
CHAT_TEMPLATE = (
    r"""
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content or [] -%}{{- part.text -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set has_system = messages and messages[0].role == 'system' -%}
{%- if has_system and not tools -%}
    {%- set tools = messages[0].tools -%}
{%- endif -%}
{%- if tools -%}
    {%- if tools is string -%}
        {{- raise_exception('tools is JSON text; a template cannot parse it, pass a list') -}}
    {%- endif -%}
    {{- '<|im_start|>system\n' -}}
    {%- if has_system and text(messages[0].content) -%}
        {{- text(messages[0].content) + '\n\n' -}}
    {%- endif -%}
    {{- 'TOOLS_HEAD' -}}
    {%- for tool in tools -%}
        {{- '' if loop.first else '\n' -}}{{- tool | tojson -}}
    {%- endfor -%}
    {{- 'TOOLS_TAIL<tool_call>TOOLS_EXAMPLE</tool_call><|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'system' and loop.first and tools -%}
    {%- elif message.role == 'system' or message.role == 'user' -%}
        {{- '<|im_start|>' + message.role + '\n' + text(message.content) + '<|im_end|>\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>user\n' if loop.first or loop.previtem.role != 'tool' else '\n' -}}
        {{- '<tool_response>\n' + text(message.content) + '\n</tool_response>' -}}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' else '' -}}
    {%- elif message.role == 'assistant' -%}
        {%- set content = text(message.content) | trim -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- generation -%}
            {%- if message.reasoning_content is string -%}
                {{- '<think>\n' + (message.reasoning_content | trim) + '\n</think>\n\n' -}}
            {%- endif -%}
            {{- content -}}
            {%- if message.tool_calls is string and message.tool_calls -%}
                {{- raise_exception('tool_calls is JSON text; a template cannot parse it, pass a list') -}}
            {%- endif -%}
            {%- for item in message.tool_calls or [] -%}
                {%- set call = item.function or item -%}
                {{- '\n' if content or not loop.first else '' -}}
                {{- '<tool_call>\n{"name": ' + (call.name | tojson) + ', "arguments": ' -}}
                {{- call.arguments if call.arguments is string else ((call.arguments or {}) | tojson) -}}
                {{- '}\n</tool_call>' -}}
            {%- endfor -%}
            {{- '<|im_end|>' -}}
        {%- endgeneration -%}
        {{- '\n' -}}
    {%- else -%}
        {{- raise_exception('unknown role; roles are system, user, assistant, tool') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if enable_thinking is defined and enable_thinking is not none -%}
        {{- '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' -}}
    {%- endif -%}
{%- endif -%}
""".strip()
    .replace("TOOLS_HEAD", TOOLS_HEAD.replace("\n", r"\n"))
    .replace("TOOLS_TAIL", TOOLS_TAIL.replace("\n", r"\n"))
    .replace("TOOLS_EXAMPLE", TOOLS_EXAMPLE.replace("\n", r"\n"))
)


def normalise_conversation(messages, tools=None) -> tuple[list[dict], list[dict] | None]:
    """Brings every accepted way to write a conversation into one, which apply_chat_template takes, too.

    Content becomes a string, JSON text becomes lists, tool calls become {"name", "arguments"}, `tools` of a first
    system message become the second value (the argument wins where both are given). Keys that are None are absent.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError("messages must be a list with at least one message")
    result = [_normalise_message(i, message) for i, message in enumerate(messages)]
    for i, message in enumerate(messages):
        if message.get("tools") and (i > 0 or message["role"] != "system"):
            raise ValueError(f"message {i} has tools; only a system message that comes first may have them")
    tools = _json_objects(tools, "tools") or _json_objects(messages[0].get("tools"), "message 0: tools")
    return result, tools


def _normalise_message(i: int, message) -> dict:
    if not isinstance(message, dict):
        raise ValueError(f"message {i} must be an object with role and content, not {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"message {i} has role {role!r}; roles are {', '.join(ROLES)}")
    calls = _json_objects(message.get("tool_calls"), f"message {i}: tool_calls")
    thinking = message.get("reasoning_content")
    if role != "assistant" and (calls or thinking):
        raise ValueError(f"message {i} has tool_calls or reasoning_content; only an assistant message may have them")
    result = {"role": role, "content": _content_text(i, message.get("content"), optional=bool(calls))}
    if thinking is not None and role == "assistant":
        if not isinstance(thinking, str):
            raise ValueError(f"message {i}: reasoning_content must be a string, not {type(thinking).__name__}")
        result["reasoning_content"] = _valid_text(i, thinking)
    if calls:
        result["tool_calls"] = [_normalise_call(i, call) for call in calls]
    return result


def _content_text(i: int, content, optional: bool) -> str:
    if isinstance(content, str):
        return _valid_text(i, content)
    if content is None and optional:
        return ""  # OpenAI's way to write an answer that is a tool call only
    if content is None:
        raise ValueError(f"message {i} has no content")
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return _valid_text(i, "".join(part["text"] for part in content))
    raise ValueError(f'message {i}: content must be a string or a list of {{"type": "text", "text": ...}}')


def _valid_text(i: int, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, as broken JSON writers leave it behind
        raise ValueError(f"message {i}: character {error.start} is no valid Unicode") from None
    return text


def _normalise_call(i: int, call: dict) -> dict:
    function = call.get("function") or call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"message {i}: tool_calls needs a name for every call")
    arguments = function.get("arguments")
    if not isinstance(arguments, dict | str | None):
        raise ValueError(f"message {i}: arguments of a tool call must be an object or JSON text")
    return {"name": function["name"], "arguments": arguments or {}}


def _json_objects(value, what: str) -> list[dict] | None:
    """A list of objects, given as such or as JSON text; None where there is none."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{what} is not JSON: {error}") from None
    if value is None or value == "" or value == []:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{what} must be a list of objects, or JSON text of one")
    return list(value)


def assistant_text(message: dict) -> str:
    """All an assistant message says, as one string: think block, content, tool calls; trimmed at both ends."""
    content = message["content"].strip()
    calls = [
        f'<tool_call>\n{{"name": {to_json(call["name"])}, "arguments": {_arguments(call)}}}\n</tool_call>'
        for call in message.get("tool_calls", [])
    ]
    said = "\n".join([content] * bool(content) + calls)
    if "reasoning_content" in message:
        return f"<think>\n{message['reasoning_content'].strip()}\n</think>\n\n{said}"
    return said


def _arguments(call: dict) -> str:
    """A string is JSON text already: OpenAI's way to write the arguments."""
    return call["arguments"] if isinstance(call["arguments"], str) else to_json(call["arguments"])


def to_json(value) -> str:
    """JSON as the template's `tojson` writes it."""
    return json.dumps(value, ensure_ascii=False)
