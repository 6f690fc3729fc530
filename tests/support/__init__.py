"""Builders and measures that tests share; import them as ``support.<module>``."""
