"""Tools beside the engine: the command line, the bench and the torture. The engine does not know them."""
