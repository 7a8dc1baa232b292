"""How long jobs take: amounts of work from a plan, speeds from a measurement or from data, and what comes of the two."""
