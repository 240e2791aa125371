"""Memory that is still elsewhere: brings absent pages when they are touched, and the others behind."""
