"""What a run says about itself: events, the sinks that show or keep them, and the loss curve."""

from entrenar.observe.events import Event, emit, subscribed

__all__ = ["Event", "emit", "subscribed"]
