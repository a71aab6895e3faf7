"""Exchange: what do the ways for rows to travel between devices cost, beside not travelling?"""
