"""The demonstration: `python -m shop.demo` runs the shop, kills its workers, and checks every invoice afterwards.

`show` tells the story · `server` its database · `processes` the payment service and the workers · `facts` what is
compared · `expected` what the file says · `actual` what happened · `summary` what is printed.
"""
