"""New weights from the trainer to the SGLang servers after every step: one interface (transport.py), one file a transport."""
