"""Runs in another environment than ours: continues prompts greedily with one runtime, and tells what came.

    python runtime_runner.py RUNTIME MODEL PROMPTS.json TOKENS OUT.json

PROMPTS: lists of token ids. OUT: {"version", "tokens": lists of token ids}. Nothing of this project is imported: the
environment holds the runtime. Each function is also the recipe: this is all that the runtime wants.
"""

import importlib.metadata
import json
import sys
import urllib.request


def transformers(model, prompts, n):
    from transformers import AutoModelForCausalLM

    return _generate(AutoModelForCausalLM.from_pretrained(model), prompts, n)


def onnxruntime(model, prompts, n):
    from optimum.onnxruntime import ORTModelForCausalLM

    return _generate(ORTModelForCausalLM.from_pretrained(model, export=True), prompts, n)


def openvino(model, prompts, n):
    from optimum.intel import OVModelForCausalLM

    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # by default it computes in half precision where the processor can
    return _generate(OVModelForCausalLM.from_pretrained(model, export=True, ov_config=exact), prompts, n)


def _generate(model, prompts, n):
    import torch

    torch.set_num_threads(1)
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
        yield out[0, len(prompt) :].tolist()


def ctranslate2(model, prompts, n):
    import ctranslate2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ctranslate2.converters.TransformersConverter(model).convert(f"{model}.ct2", force=True)
    generator = ctranslate2.Generator(f"{model}.ct2", intra_threads=1)
    for prompt in prompts:
        pieces = tokenizer.convert_ids_to_tokens(prompt)  # it takes tokens by name
        found = generator.generate_batch([pieces], max_length=n, sampling_topk=1, include_prompt_in_result=False)
        yield found[0].sequences_ids[0]


def llama_cpp(model, prompts, n):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = model, 2048, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    for prompt in prompts:
        body = {"prompt": prompt, "n_predict": n, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        address, kind = f"{server.listening_address}/completion", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(address, json.dumps(body).encode(), kind)) as answer:
            yield json.load(answer)["tokens"]


RUNNERS = {  # name: (function, the package whose version is told)
    "transformers": (transformers, "transformers"), "onnxruntime": (onnxruntime, "onnxruntime"),
    "openvino": (openvino, "openvino"), "ctranslate2": (ctranslate2, "ctranslate2"),
    "llama.cpp": (llama_cpp, "xllamacpp"),
}  # fmt: skip


def main():
    name, model, prompts, n, out = sys.argv[1:]
    with open(prompts, encoding="utf-8") as file:
        asked = json.load(file)
    runner, package = RUNNERS[name]
    result = {"tokens": list(runner(model, asked, int(n))), "version": importlib.metadata.version(package)}
    with open(out, "w", encoding="utf-8") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
