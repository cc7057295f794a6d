"""What an App is made of: handles on agents, handles on runs, signatures, and finding the App of a command line.

The App is :mod:`orchestra.app`. How tasks are run is the business of layers below.
"""
