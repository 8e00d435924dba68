"""Opens a page of the app in a test, without a browser."""

from pathlib import Path

import stage
from streamlit.testing.v1 import AppTest

ROOT = Path(__file__).resolve().parent.parent


def script(name: str) -> None:
    from pages import app

    app.shell(app.chosen_words())
    getattr(app, name)()


def open_page(name: str, language="zh", **state) -> AppTest:
    """state: values of st.session_state before the page is first drawn."""
    app = AppTest.from_function(script, kwargs={"name": name}, default_timeout=60)
    app.session_state["language"] = language
    for key, value in state.items():
        app.session_state[key] = value
    return clean(app.run())


def clean(app: AppTest) -> AppTest:
    """The page, if it ran without an exception and no library warned on it."""
    assert not app.exception, app.exception
    assert not any(stage.warned(w.value) for w in app.warning)
    return app


def said(app: AppTest) -> list[tuple[str, str]]:
    """(who, text) of each message of the chat."""
    return [(m.name, "".join(x.value for x in m.text)) for m in clean(app).chat_message]
