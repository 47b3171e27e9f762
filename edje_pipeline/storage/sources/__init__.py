"""Where images come from; every kind lists once and reads by location."""
