"""Where an artifact's bytes and names go: files, headers, index, configuration. One object a container."""
