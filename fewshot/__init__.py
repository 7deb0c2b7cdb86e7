"""The library that the scripts share; its folders are its wings."""
