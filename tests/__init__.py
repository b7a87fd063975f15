"""Run-time type checker for the package's functions under pytest: shapes and types, where an int counts as a float."""

from beartype import BeartypeConf, beartype

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
