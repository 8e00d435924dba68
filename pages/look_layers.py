"""Attention by layer and head, what each layer would say, how long its vectors are, where experts get their tokens."""

from dataclasses import replace

import numpy as np
import streamlit as st

from inference.sampling import SamplingParams
from inspection import layers as by_layer
from inspection.next_token import watch
from inspection.tokens import own_model
from pages import charts
from pages.look_text import Look, choose_place, paint

HOVER = 40  # tokens up to which a map says its pairs under the mouse
WINDOW = 12  # tokens beside one another under the logit lens


def attention(look: Look) -> None:
    say, maps = look.say, look.traced.attention.numpy()  # (L, H, T, T)
    L, H, T, _ = maps.shape
    left, right = st.columns(2)
    layer = left.select_slider(say("layer"), range(L), min(1, L - 1), key="layer") if L > 1 else 0
    heads = ["all", *range(H)]
    head = right.select_slider(say("head"), heads, "all", key="head",
                               format_func=lambda h: say("mean") if h == "all" else str(h))  # fmt: skip
    chosen = maps[layer].mean(axis=0) if head == "all" else maps[layer, head]
    if T <= HOVER:
        names = charts.places(look.names)
        titles = (say("looks_from"), say("looks_at"), say("weight_of"))
        st.altair_chart(charts.heat(chosen, names, names, titles, height=charts.AXES + max(300, 15 * T)))
    else:
        st.image(charts.attention_image(chosen), alt=say("attention_alt", layer=layer, head=head))
        st.caption(say("map_help"))
    st.markdown(say("looks"))
    row = chosen[choose_place(look, "attention place", 0, T - 1, T - 1)]
    paint("attention place", charts.by_strength(np.sqrt(row), 210), [f"{weight:.1%}" for weight in row])
    st.markdown(say("all_heads", layer=layer))
    images = [charts.attention_image(one, 150) for one in maps[layer]]
    st.image(images, caption=[str(h) for h in range(H)], width=150)
    write_on(look, layer, head)


def write_on(look: Look, layer: int, head) -> None:
    """The model goes on, and each new token shows where the position that predicted it looked."""
    if not st.button(look.say("watch_writing"), key="watch writing", icon=":material/play_arrow:"):
        return
    place, start = st.empty(), look.ids[: look.answer]
    names, said = list(look.names[: look.answer]), st.empty()
    for new in watch(look.engine, start, SamplingParams(max_tokens=32, temperature=0)):
        weights = new.attention[layer].mean(axis=0) if head == "all" else new.attention[layer, head]
        hints = [f"{weight:.1%}" for weight in weights]
        place.html(charts.coloured(names, charts.by_strength(np.sqrt(weights), 210), hints))
        names.append(charts.labels(look.tokenizer, new.piece.token_ids)[0])
        said.text("→ " + names[-1])


def layers(look: Look) -> None:
    say, T, L = look.say, len(look.ids), len(look.traced.residuals)
    last = max(0, T - WINDOW)
    begin = min(max(0, look.answer - 3), last)
    first = st.slider(say("from_place"), 0, last, begin, key="lens place") if last else 0
    end = min(first + WINDOW, T)
    # Of the places that are shown only: the head on all layers of all places costs as much as the pass itself.
    shown = replace(look.traced, ids=look.ids[first:end], residuals=look.traced.residuals[:, first:end])
    lens = by_layer.logit_lens(own_model(look.engine), shown, 1)
    rows = range(L - 1, -1, -1)  # the last layer on top: the stream flows upward
    texts = [charts.labels(look.tokenizer, lens.best[r, :, 0]) for r in rows]
    names = [say("embedding") if r == 0 else say("after_layer", n=r) for r in rows]
    values = np.stack([lens.probability[r, :, 0] for r in rows])
    st.altair_chart(charts.heat(values, names, charts.places(look.names[first:end], first),
                                (say("layer"), say("token"), say("probability")), texts))  # fmt: skip
    st.markdown(say("norms_help"))
    sizes = by_layer.norms(look.traced)
    found = [("residual", sizes.residual.mean(axis=1)), ("attended", sizes.attended.mean(axis=1)),
             ("fed", sizes.fed.mean(axis=1))]  # fmt: skip
    points = [{"layer": i if name == "residual" else i + 1, "norm": float(v), "what": say(name)}
              for name, values in found for i, v in enumerate(values)]  # fmt: skip
    st.altair_chart(charts.lines(points, "layer", "norm", "what", (say("layer"), say("length")), points=True))


def experts(look: Look) -> None:
    say = look.say
    if look.traced.router is None:
        st.info(say("dense"))
        return
    found = by_layer.experts(own_model(look.engine), look.traced)
    L, E = found.load.shape
    names = [say("after_layer", n=i + 1) for i in range(L)]
    st.altair_chart(charts.heat(found.load, names, [f"E{e}" for e in range(E)],
                                (say("layer"), say("expert"), say("load"))))  # fmt: skip
    layer = st.select_slider(say("layer"), range(L), 0, key="expert layer") if L > 1 else 0
    chosen, weight = found.chosen[layer], found.weight[layer]
    hints = [", ".join(f"E{e} {w:.0%}" for e, w in zip(*pair)) for pair in zip(chosen, weight)]
    st.html(charts.coloured(look.names, charts.by_turns(chosen[:, 0].tolist()), hints))
    st.caption(say("experts_colours"))
