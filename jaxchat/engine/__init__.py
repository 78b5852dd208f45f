"""The one place where text is generated: chat, exams, samples and RL rollouts."""

from jaxchat.engine.request import Event, Handle, QueueFull, Request, Token, Turn
from jaxchat.engine.scheduler import Engine, load_run, trained_stages

__all__ = ["Engine", "Event", "Handle", "QueueFull", "Request", "Token", "Turn", "load_run", "trained_stages"]
