"""Makes a method known to PEFT."""

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from sparing.errors import ConfigError
from sparing.tuners.config import TunerConfig
from sparing.tuners.tuner import Tuner


def register_tuner(config_class: type[TunerConfig], tuner_class: type[Tuner]) -> None:
    """Make a method known to PEFT: `get_peft_model`, `save_pretrained`, `from_pretrained`.

    PEFT keeps its methods in an enum, so the method's member is added first. Registering the same
    classes again does nothing.

    Raises:
        ConfigError: this version of PEFT already has another method of that name.
    """
    name = config_class.method
    if name.upper() in PeftType.__members__:
        if PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[name.upper()]) is config_class:
            return
        raise ConfigError(
            f"PEFT method {name!r}",
            expected="a name that PEFT does not use",
            found=f"a method of that name in PEFT: {PeftType[name.upper()]!r}",
            mend="Report it to sparing, and use an older peft meanwhile.",
        )
    member = str.__new__(PeftType, name.upper())
    member._name_ = member._value_ = name.upper()
    type.__setattr__(PeftType, name.upper(), member)
    PeftType._member_names_.append(name.upper())
    PeftType._member_map_[name.upper()] = member
    PeftType._value2member_map_[name.upper()] = member
    register_peft_method(
        name=name, config_cls=config_class, model_cls=tuner_class, prefix=tuner_class.prefix
    )
