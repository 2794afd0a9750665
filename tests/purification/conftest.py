"""A busy machine is not a failing test: hypothesis does not time examples here."""

from hypothesis import settings

settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
