"""A callback of LiteLLM's proxy that writes what was said to the file that CHAT_LOG names, a line a
call, as `logs.path` reads it. It belongs beside the proxy's config.yaml, which says

    litellm_settings: {callbacks: custom_callbacks.proxy_handler_instance}

and the proxy is started by `CHAT_LOG=/logs/chats.jsonl litellm --config config.yaml`.
"""

import json
import os

from litellm.integrations.custom_logger import CustomLogger


class Log(CustomLogger):
  async def async_log_success_event(self, kwargs, response_obj, start_time, end_time):
    with open(os.environ["CHAT_LOG"], "a", encoding="utf-8") as file:
      file.write(json.dumps(kwargs["standard_logging_object"], default=str) + "\n")


proxy_handler_instance = Log()
