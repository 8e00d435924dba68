"""What happens inside a model and in its runs, as numbers: tokens, probabilities, attention, layers; logs of training.

    engine = Engine(*load_model("out/full_sft_512.pth")[:2])
    ids = read(engine, "春天来了")                 tokens.py
    traced = trace(own_model(engine), ids)          trace.py: one forward pass; all that follows reads it
    next_tokens(traced).best, traced.attention      next_token.py
    logit_lens(own_model(engine), traced).best      layers.py
    find_runs("out").runs[0].log.series("loss")     runs.py, run_log.py

Nothing here draws: the page and the course's figures do. Mistakes of the user are UserErrors with one sentence. Imports
common/, model/ and inference/.
"""
