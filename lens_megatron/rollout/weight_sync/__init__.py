"""New weights from the trainer to the SGLang servers after every step: one interface (delivery.py), one file a transport."""
