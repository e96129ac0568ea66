"""RecBole as it is, made to run on today's packages."""
