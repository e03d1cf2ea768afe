"""The demonstration: `python -m shop.demo` runs the shop, kills its workers, and checks every invoice afterwards.

`show` tells the story · `mishaps` what goes wrong in it on purpose · `server` its database · `processes` the payment
service and the workers · `facts` what is compared · `expected` what the file says · `actual` what happened · `summary`
what is printed.
"""
