"""One solve in other runtimes' files, without rounding again."""
