"""Whole characters only: which tokens may come next where a token may be a part of a character.

The tokens of a byte-level vocabulary are byte strings. A rare character is several tokens, and a small model may begin
one and not end it: readers then see U+FFFD. UTF-8 has eight states between two bytes, so a table of eight rows says for
each token whether it may follow and which state comes after it. In the state between characters a token that begins
in the middle of one is forbidden; inside a character everything is that does not go on with it, the end included.
"""

import torch

# Between characters; one, two, three more bytes are due; after E0, ED, F0, F4, where not every second byte is allowed.
WHOLE, ONE, TWO, THREE, E0, ED, F0, F4 = range(8)
FORBIDDEN = -1
# state: (first byte, last byte, next state), Unicode 15, table 3-7
BYTES = {
    WHOLE: [(0x00, 0x7F, WHOLE), (0xC2, 0xDF, ONE), (0xE0, 0xE0, E0), (0xE1, 0xEC, TWO), (0xED, 0xED, ED),
            (0xEE, 0xEF, TWO), (0xF0, 0xF0, F0), (0xF1, 0xF3, THREE), (0xF4, 0xF4, F4)],
    ONE: [(0x80, 0xBF, WHOLE)], TWO: [(0x80, 0xBF, ONE)], THREE: [(0x80, 0xBF, TWO)],
    E0: [(0xA0, 0xBF, ONE)], ED: [(0x80, 0x9F, ONE)], F0: [(0x90, 0xBF, TWO)], F4: [(0x80, 0x8F, TWO)],
}  # fmt: skip


def after(state: int, text: bytes) -> int:
    """The state after these bytes, FORBIDDEN where UTF-8 does not allow them."""
    for byte in text:
        state = next((then for first, last, then in BYTES[state] if first <= byte <= last), FORBIDDEN)
        if state == FORBIDDEN:
            break
    return state


class Characters:
    """The table of a vocabulary: `after[state][token]`, and `bias` (8, V): 0, or -inf where forbidden."""

    def __init__(self, token_bytes: list[bytes]):
        """token_bytes: what each entry adds to a text, b"" for a marker. Markers stand between characters."""
        self.after = [
            [after(state, text) if text or state == WHOLE else FORBIDDEN for text in token_bytes] for state in BYTES
        ]
        self.bias = torch.zeros(len(BYTES), len(token_bytes))
        self.bias[torch.tensor(self.after) == FORBIDDEN] = float("-inf")

    def state(self, tokens: list[int]) -> int:
        """The state after a text. A character has four bytes at most, so its last three tokens decide."""
        state = WHOLE
        for token in tokens[-3:]:
            state = self.next(state, token)
        return state

    def next(self, state: int, token: int) -> int:
        """The state after one more token; one that is forbidden was not chosen here, and a character begins anew."""
        return max(self.after[state][token], WHOLE)
