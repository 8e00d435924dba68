"""Data: what a stage file holds, which of its tokens are learned, and how its rows pack."""

from pathlib import Path

import streamlit as st

from pages.frame import LASTS, fault, opened
from pages.words import Words

LARGE = 50 * 2**20  # bytes above which the report is made on request only
LEARNED, GIVEN = "hsla(130, 75%, 45%, .38)", "hsla(220, 15%, 55%, .14)"
FOLDERS = ("dataset", "dataset/sample")


def show(say: Words) -> None:
    st.title(say("data_title"))
    st.caption(say("data_help"))
    found = files()
    with st.sidebar:
        usual = next((i for i, path in enumerate(found) if "sft" in path), 0)
        chosen = st.selectbox(say("file"), [*found, ""], usual, format_func=lambda path: path or say("other_path"),
                              key="data file", **LASTS)  # fmt: skip
        path = chosen or st.text_input(say("path"), key="data path", **LASTS).strip()
        tokenizer = choose_tokenizer(say)
        seq_len = st.slider(say("seq_len"), 64, 2048, 512, 64, key="seq_len", **LASTS)
    if not path:
        st.info(say("choose_file"))
        return
    from common.errors import UserError

    try:
        learned(say, path, tokenizer, seq_len)
        report(say, path, tokenizer)
    except (UserError, ValueError, OSError) as error:
        fault(error, say)


def files() -> list[str]:
    """The data files in dataset/: MiniMind's, the user's own, the sample's."""
    from data.files import kind_of

    paths = (path for folder in FOLDERS for path in sorted(Path(folder).glob("*")))
    return [str(path) for path in paths if path.is_file() and kind_of(path) and path.suffix != ".md"]


def choose_tokenizer(say: Words) -> str:
    """The path of a model whose tokenizer counts, "" for the project's own."""
    from chat.models import found_models

    names = ["", *map(str, found_models("out"))]
    return st.selectbox(say("tokenizer"), names, format_func=lambda name: name or say("own_tokenizer"),
                        key="data tokenizer", **LASTS)  # fmt: skip


def tokenizer_of(name: str):
    from model.tokenizer import load_tokenizer

    return opened(Path(name), Path(name).stat().st_mtime_ns)[0].tokenizer if name else load_tokenizer()


# ---------------------------------------------------------------------------------------------------- what is learned
@st.cache_data(max_entries=8, show_spinner=False)
def previewed(path: str, changed: int, tokenizer: str, seq_len: int):
    from cleaning.preview import preview

    return preview(path, tokenizer_of(tokenizer), seq_len)


def learned(say: Words, path: str, tokenizer: str, seq_len: int) -> None:
    """Rows with their loss mask in colours, and the rows of training they make."""
    from common.errors import UserError
    from pages import charts

    if not Path(path).is_file():
        raise UserError(f"no such file: {path}")
    with st.spinner(say("reading")):
        found = previewed(path, Path(path).stat().st_mtime_ns, tokenizer, seq_len)
    if not found.whole:
        st.caption(say("first_rows"))
    if found.bad:
        with st.expander(say("bad_rows", n=len(found.bad))):
            for line, why in found.bad[:50]:
                st.text(f"{path}:{line}: {why}")
    st.subheader(say("mask"))
    n = st.number_input(say("row"), 1, len(found.rows), 1, key=f"row of {path}")
    row = found.rows[n - 1]
    if found.kind == "pair":
        st.caption(say("pair_side", side=say("rejected" if n % 2 == 0 else "chosen")))
    tokens = tokenizer_of(tokenizer)
    names = charts.labels(tokens, row.ids)
    colours = [LEARNED if mask else GIVEN for mask in row.learned]
    hints = [say("is_learned") if mask else say("is_given") for mask in row.learned]
    st.html(charts.coloured(names, colours, hints))
    st.caption(say("mask_help", n=sum(row.learned), all=len(row.ids)))
    st.subheader(say("packing"))
    st.html(strips(found.packed, seq_len))
    st.caption(say("packing_help", rows=f"{found.n_packed:,}", real=f"{found.real:.1%}", cut=f"{found.cut:,}"))


def strips(packed: list[list[int]], seq_len: int) -> str:
    """HTML: a bar for each row of training, a block for each piece of a document in it, padding left open."""
    from pages.charts import HUES

    bars = []
    for lengths in packed:
        blocks = "".join(
            f'<div title="{length}" style="width: {100 * length / seq_len:.3f}%; background: '
            f'hsla({HUES[i % len(HUES)]}, 70%, 55%, .6); border-right: 1px solid rgba(128,128,128,.6)"></div>'
            for i, length in enumerate(lengths)
        )
        bars.append(f'<div style="display: flex; height: 16px; margin: 3px 0; border: 1px solid '
                    f'rgba(128,128,128,.5)">{blocks}</div>')  # fmt: skip
    return "".join(bars)


# --------------------------------------------------------------------------------------------------------- the report
@st.cache_data(max_entries=8, show_spinner=False)
def described(path: str, changed: int, tokenizer: str) -> dict:
    import tempfile

    from cleaning.report import describe

    with tempfile.TemporaryDirectory() as folder:
        tokenizer_of(tokenizer).save_pretrained(folder)
        return describe(path, folder, samples=5)


def report(say: Words, path: str, tokenizer: str) -> None:
    """The figures of `python data_process.py report`, for the whole file."""
    st.subheader(say("report"))
    large = Path(path).stat().st_size > LARGE
    if large:
        st.caption(say("large"))
    if not st.toggle(say("make_report"), value=not large, key=f"report of {path}"):
        return
    with st.spinner(say("reading")):
        found = described(path, Path(path).stat().st_mtime_ns, tokenizer)
    figures(say, found)
    st.caption(say("samples_of_file"))
    for text in found["samples"]:
        with st.container(border=True):
            st.text(text)


def figures(say: Words, found: dict) -> None:
    from pages import charts

    shares = {
        "rows": f"{found['rows']:,}", "tokens_all": f"{found['tokens']:,}",
        "tokens_learned": f"{found['learned_tokens'] / found['tokens']:.0%}",
        "per_token": str(found["characters_per_token"]), "copies_exact": f"{found['exact_copies']:,}",
        "copies_near": f"{found['near_copies']:,}",
    }  # fmt: skip
    with st.container(horizontal=True):
        for key, value in shares.items():
            st.metric(say(key), value, width=150)
    for key in ("histogram", "languages", "turns"):
        if found[key]:
            st.altair_chart(charts.columns(list(found[key]), list(found[key].values()), say(f"{key}_of")))
