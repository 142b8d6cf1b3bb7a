"""Text by a quantized Phi model, with the arguments of Candle's example of the same name.

    python examples/quantized_phi.py --which phi-2 --prompt "Write a function to count prime numbers up to N. "

Everything else is as in quantized.py.
"""

from __future__ import annotations

from hipquant.aliases import QUANTIZED_PHI
from quantized import arguments, main

if __name__ == "__main__":
    main(arguments(QUANTIZED_PHI, "phi-3b", "Write a function to count prime numbers up to N. "))
