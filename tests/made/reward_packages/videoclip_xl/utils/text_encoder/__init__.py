from .text_encoder import *  # noqa: F403
