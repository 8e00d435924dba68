"""The tokenizer's files as other programs need them: what our code knows without being told stands in them."""

import json

from model.tokenizer_files import tokenizer_to_dict


def exported_tokenizer(tokenizer, context: int, base: bool) -> dict[str, str]:
    """The files of an exported tokenizer as {file name: text}.

    context: positions of the model. base: a model that continues text; its prompts begin with the start token.
    """
    files = tokenizer_to_dict(tokenizer)
    config = json.loads(files["tokenizer_config.json"])
    # transformers 4 would add token_type_ids, which no model of ours takes, and `generate` refuses them.
    config["model_input_names"] = ["input_ids", "attention_mask"]
    config["model_max_length"] = context  # what cuts long prompts reads it
    if tokenizer.chat_template:
        template = exported_template(tokenizer.chat_template)
        config["chat_template"] = files["chat_template.jinja"] = template
    if base:
        content = json.loads(files["tokenizer.json"])
        content["post_processor"] = begins_with(tokenizer.bos_token, tokenizer.bos_token_id)
        files["tokenizer.json"] = json.dumps(content, ensure_ascii=False, indent=2)
    files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2)
    return files


def exported_template(template: str) -> str:
    """The chat template with its switch for thinking under MiniMind's name.

    llama.cpp and mistral.rs turn `enable_thinking` on for every template that reads it, so each answer would begin
    inside a think block, also of a model that never saw one. `open_thinking` stays off until a request asks.
    """
    return template.replace("enable_thinking", "open_thinking")


def begins_with(token: str, token_id: int) -> dict:
    """The step of tokenizer.json that puts a token before each text, as each document of pretraining had it.

    Chats are not touched: what applies a chat template encodes the result without this step.
    """
    piece = {"SpecialToken": {"id": token, "type_id": 0}}
    a, b = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    return {
        "type": "TemplateProcessing", "single": [piece, a], "pair": [piece, a, b],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }  # fmt: skip
