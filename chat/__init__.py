"""Talking to a model: the terminal, and the page without Streamlit. Imports common/, model/ and inference/."""
