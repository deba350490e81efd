"""A server of many versions of one base: slots, the engine that fills them, OpenAI's protocol, and HTTP."""
