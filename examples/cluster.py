"""Group the places of a text by what a language model expects next, and find each place again.

All pairs of next-token distributions come from `klfast.pairwise`. The square root of the
Jensen-Shannon divergence is a metric, so that any clustering of distances can take it. It needs
SciPy: pip install "klfast[stats]".
"""

from pathlib import Path

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

import klfast

DATA = Path(__file__).parent / "data"
#: What the tokens are that the model finds most probable somewhere in this text.
WORDS = {
    1008: "*", 1012: ".", 1024: ":", 1036: "`", 1066: "~", 1996: "the", 2000: "to", 2085: "now",
    2465: "class", 3343: "policy", 4168: "-me", 4471: "message", 10373: "email", 19362: "-par",
}  # fmt: skip

base = np.load(DATA / "base.npy", mmap_mode="r")  # logits of 24 places
distances = np.sqrt(klfast.pairwise(base, metric="js"))

tree = linkage(squareform(distances, checks=False), "average")
groups = fcluster(tree, 0.65, "distance")
print(f"{len(base)} places in {groups.max()} groups, farthest {distances.max():.3f} of 0.833")
for group in range(1, groups.max() + 1):
    members = np.flatnonzero(groups == group)
    words = [WORDS[int(base[place].argmax())] for place in members]
    print(f"  {', '.join(f'{place} {word}' for place, word in zip(members, words, strict=True))}")

# The model with 4-bit weights, at every place: is it nearest to itself, and by how much?
quantized = np.load(DATA / "int4.npy", mmap_mode="r")
for metric in ("js", "kl"):
    found = klfast.pairwise(quantized, base, metric).argmin(1)
    print(
        f"nearest by {metric}: {np.mean(found == np.arange(len(base))):.0%} of places found again"
    )
