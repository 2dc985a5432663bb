expertSection();
routerSection();
traceSection();
causalSection();
dividendSection();
setUpContents();
setUpTheme();
setUpTip();
