"""The models that a visitor can choose from, and one of them opened."""

from pathlib import Path

from chat.abilities import Abilities, abilities
from common.flags import Parser
from inference import open_model
from inference.engine import Engine
from model.weights_file import STATE_SUFFIX, all_weights


def found_models(folder="out") -> list[Path]:
    """Weights and adapters in `folder` and the folders in it: chat models, then adapters, then base models, the newest
    of each kind first."""
    adapters = [p for p in Path(folder).glob("**/lora/*.pth") if p.is_file() and not p.stem.endswith(STATE_SUFFIX)]
    adapters = [p for p in adapters if p.name[0] != "."]
    newest = sorted({*all_weights(folder), *adapters}, key=lambda p: (p.stat().st_mtime_ns, p), reverse=True)
    return sorted(newest, key=lambda p: (is_base(p), p.parent.name == "lora"))


def is_base(path: Path) -> bool:
    """Whether a file's name says that it is a base model, which continues texts and was taught no chats."""
    return path.name.startswith("pretrain_")


def opened(path: Path) -> tuple[Engine, Abilities]:
    """Raises ValueError where it cannot be read. Of an adapter: the model it was trained on, with it merged in."""
    parser = Parser()
    open_model.add_model_flags(parser)
    engine, record = open_model.open_engine(parser.parse_args([]), path)
    return engine, abilities(record)
