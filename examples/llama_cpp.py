"""Compare files that llama.cpp wrote: its own numbers, and those without its clamping.

Such files come from ``llama-perplexity -m MODEL -f TEXT --kl-divergence-base FILE``, one for each
model, with the same text and context. Those in examples/data are the first chunk of real ones.
"""

from pathlib import Path

import klfast
from klfast import llama_cpp

DATA = Path(__file__).parent / "data"


def main() -> None:
    base, test = DATA / "base.kld", DATA / "q5_0.kld"

    print("as llama-perplexity --kl-divergence prints it (klfast compare --llama-compat):\n")
    for line in llama_cpp.statistics(llama_cpp.BaseLogits(base), klfast.open_logits(test)):
        print(line)

    result = klfast.evaluate(base, test)
    summary = result.summary()
    kl, floor = summary.measures["kl"], summary.measures["floor_mass_p"]
    print("\nwith all that is known of the tail (klfast compare):\n")
    print(
        f"mean KL {kl.mean:.6f} ± {kl.standard_error:.6f}, least {kl.min:.2g}, worst {kl.max:.4f}"
    )
    print(f"of which 16 bits cause about {summary.value('noise_floor'):.1g}")
    print(f"mass at the floor of a row: {floor.mean:.2g}, at most {floor.max:.2g}")
    print(f"PPL(base) {summary.value('perplexity.base'):.4f}")


if __name__ == "__main__":
    main()
