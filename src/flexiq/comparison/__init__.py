"""Published methods of mixed and switchable precision on the same ground as the dial, to compare it with."""
