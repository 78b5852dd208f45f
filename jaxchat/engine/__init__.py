"""The one place where text is generated: chat, exams, samples and RL rollouts."""

from jaxchat.engine.request import Event, Handle, QueueFull, Request, Result, Token
from jaxchat.engine.scheduler import Engine

__all__ = ["Engine", "Event", "Handle", "QueueFull", "Request", "Result", "Token"]
