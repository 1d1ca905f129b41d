"""Training configurations; `default.py` lists and explains every knob."""
