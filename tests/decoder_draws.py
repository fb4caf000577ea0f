"""Problems of decoder_problems.py as hypothesis draws them, which a machine with a GPU may lack."""

from decoder_problems import MODULES
from hypothesis import strategies as st


@st.composite
def problems(draw, attention=None, vectors=False, ragged=False, ids=False):
    """Arguments of `problem`: a failing draw is printed, so it had better be short."""
    largest = {"B": 5, "T": 9, "S": 40, "E": 9, "H": 37, "A": 37, "D": 20}
    sizes = {name: draw(st.integers(1, most)) for name, most in largest.items()}
    if attention is None:
        attention = draw(st.booleans()) or draw(st.booleans())
    T = sizes["T"]
    fed_back = draw(st.sets(st.integers(1, T - 1))) if T > 1 else ()
    after = attention and draw(st.booleans())
    if vectors and after:
        sizes |= {
            "joined": draw(st.sampled_from(["", "tanh", "none"])),
            "O": draw(st.integers(1, 70)),
            "vectors_dropped": draw(st.booleans()),
            "features_dropped": draw(st.booleans()),
        }
    if attention and vectors:
        sizes["contexts_dropped"] = draw(st.booleans())
    if ragged and draw(st.booleans()):
        rows = st.lists(st.integers(0, sizes["B"]), min_size=T, max_size=T)
        sizes["batch_sizes"] = sorted(draw(rows), reverse=True)
    if ids:
        sizes["ids"] = draw(st.sampled_from([0, 1, 2, 5, 20]))
    return sizes | {
        "cell_type": draw(st.sampled_from([*MODULES])),
        "L": draw(st.integers(1, 3)),
        "attention": attention,
        "after": after,
        "dropout": draw(st.booleans()),
        "feedback": sorted(fed_back),
        "strided": draw(st.booleans()),
        "states_dropped": draw(st.sampled_from([False, False, True])),
        "seed": draw(st.integers(0, 2**31)),
    }
