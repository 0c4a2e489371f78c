"""Hugging Face checkpoints, in and out."""

from ._adapter import load_adapter as load_adapter
from ._adapter import save_adapter as save_adapter
from ._chat import ChatTemplate as ChatTemplate
from ._chat import load_chat_template as load_chat_template
from ._chat import stop_tokens as stop_tokens
from ._errors import AdapterFormatError as AdapterFormatError
from ._errors import FormatError as FormatError
from ._load import load as load
from ._save import save as save
