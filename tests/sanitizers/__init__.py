"""The compiled CPU operators under sanitizers, and between guard pages."""
