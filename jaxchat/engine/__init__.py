"""The one place where text is generated: chat, exams, samples and RL rollouts."""

from jaxchat.engine.request import Event, Handle, Request, Result
from jaxchat.engine.scheduler import Engine

__all__ = ["Engine", "Event", "Handle", "Request", "Result"]
