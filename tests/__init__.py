"""The checker that pytest hangs on every function of the package: shapes and types, an int where a float is wanted."""

from beartype import BeartypeConf, beartype

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
