from cbq.cli import main

main()
