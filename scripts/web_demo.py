"""The page in the browser: chat with a model, look inside it, watch training runs, look at data.

    streamlit run scripts/web_demo.py          then open http://127.0.0.1:8501

It reads what is in out/ and changes nothing there. The pages are in pages/.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pages import app

if __name__ == "__main__":
    app.main()
