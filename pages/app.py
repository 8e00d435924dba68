"""The app: its pages, and the way from one to another."""

import streamlit as st

from pages.frame import chosen_words, load_rooms, shell


def main() -> None:
    """The app: all pages, and the one that the address names."""
    st.set_page_config("MiniMind", page_icon="💬", layout="wide")
    say = chosen_words()
    pages = [st.Page(function, title=say(name), icon=f":material/{icon}:", url_path=name, default=name == "chat")
             for name, function, icon in PAGES]  # fmt: skip
    page = st.navigation(pages, position="top")
    shell(say)
    page.run()


# Each page is imported when it is opened: torch takes seconds, and the frame is shown before.
def chat() -> None:
    from pages import chat

    chat.show(chosen_words())


def look() -> None:
    load_rooms(chosen_words())
    from pages import look

    look.show(chosen_words())


def watch() -> None:
    load_rooms(chosen_words())
    from pages import watch

    watch.show(chosen_words())


def data() -> None:
    load_rooms(chosen_words())
    from pages import data

    data.show(chosen_words())


PAGES = (("chat", chat, "chat"), ("look", look, "visibility"), ("watch", watch, "monitoring"),
         ("data", data, "table_rows"))  # fmt: skip
