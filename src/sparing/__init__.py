"""sparing: make neural networks do more with the parameters they have.

Importing the package makes its fine-tuning methods known to PEFT, without importing PEFT (and
with it torch) before somebody needs it.
"""

from sparing import _peft_hook

__version__ = "0.1.0"

_peft_hook.install()
