"""What customers of the help desk say: for each topic a title, phrasings of training episodes, and
others that only held-out episodes use.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Topic:
  """One kind of case.

  Attributes:
    title: what the back office calls it; completes "cases of the kind '…'".
    training: a customer's words, in whole sentences.
    held_out: other words for the same.
  """

  title: str
  training: tuple[str, ...]
  held_out: tuple[str, ...]


TOPICS = (
  Topic(
    "late parcel",
    (
      "My parcel is still not here.",
      "I have waited two weeks for my delivery.",
      "The tracking has not moved for days.",
      "My order was promised for last Monday and has not come.",
      "Where is my package? It should be here by now.",
      "The delivery is overdue.",
      "Nothing has arrived yet, and it is ten days now.",
      "The courier was to come on Friday, but nobody came.",
    ),
    (
      "Ten days have passed, and no parcel has come.",
      "It was to take three days, and now it is nine.",
      "When will my parcel finally arrive?",
      "My delivery seems to be stuck somewhere.",
    ),
  ),
  Topic(
    "leaking machine",
    (
      "There is water under my machine every morning.",
      "My coffee machine leaks.",
      "It drips from below when I switch it on.",
      "The kitchen counter is wet after each cup.",
      "Water runs out of the bottom of the machine.",
      "A puddle forms around the machine.",
      "It loses water while it heats up.",
      "Something inside is not tight, water comes out.",
    ),
    (
      "I have to put a towel below the machine, for water runs out.",
      "Half of the water ends up under the machine.",
      "The machine is dripping at the back.",
      "Drops keep falling from the underside.",
    ),
  ),
  Topic(
    "wrong product",
    (
      "You sent me a different machine.",
      "I ordered the black one and got the white one.",
      "This is not what I ordered.",
      "Somebody else's product is in the box.",
      "I received the wrong model.",
      "I got a grinder instead of the kettle I bought.",
      "The box holds another product than the label says.",
      "What came is not the item on my order.",
    ),
    (
      "I unpacked it and it is a toaster, which I never ordered.",
      "There must be a mix-up, I got the small model and ordered the large one.",
      "I think I got another customer's product.",
      "The model I chose on the page is not the one that came.",
    ),
  ),
  Topic(
    "cancelling an order",
    (
      "Please cancel my order.",
      "I do not want it any more, stop the order.",
      "Can I call off what I bought an hour ago?",
      "I need to cancel before it ships.",
      "I changed my mind, do not send it.",
      "I ordered by mistake, please undo it.",
      "Please stop my order, I found it elsewhere.",
      "How do I withdraw the order I just made?",
    ),
    (
      "My daughter clicked on buy, please undo the order.",
      "I would like to take back my order before it leaves your house.",
      "Do not ship my order, I no longer need it.",
      "Please drop my order.",
    ),
  ),
  Topic(
    "change of address",
    (
      "I moved, please send it to my new home.",
      "The delivery address is wrong, please change it.",
      "Can you ship it to my office instead?",
      "I typed the wrong street.",
      "Please update where it is sent.",
      "The house number on my order is not right.",
      "I want it delivered to my sister's place.",
      "My old address is still on the order.",
    ),
    (
      "I live in another town now, can my order go there?",
      "The postcode of the delivery is my old one.",
      "Nobody is at home, please deliver it to my neighbour's house.",
      "It must go to another address than the one I gave.",
    ),
  ),
  Topic(
    "company invoice",
    (
      "I need an invoice for my company.",
      "Please send me the bill with the tax number.",
      "My accountant wants a proper invoice.",
      "Please mail a VAT invoice.",
      "Where do I get a bill in my firm's name?",
      "I need a document to claim this as an expense.",
      "The invoice must show our company's name.",
      "Our bookkeeping asks for the invoice.",
    ),
    (
      "Our firm does not accept the slip from the box, I need a real invoice.",
      "My boss pays for it, so the bill must be made out to the firm.",
      "Could I have the invoice as a document for our books?",
      "We have to hand in an invoice with our VAT number on it.",
    ),
  ),
  Topic(
    "refused voucher",
    (
      "My voucher does not work.",
      "The coupon is refused at the checkout.",
      "It says that the voucher is invalid.",
      "I cannot use my ten percent coupon.",
      "The shop will not take my gift voucher.",
      "My coupon gives an error.",
      "The voucher field turns red when I type it in.",
      "Your page tells me that my voucher does not exist.",
    ),
    (
      "I got a coupon by mail, but the basket ignores it.",
      "The price stays the same, although I entered my voucher.",
      "My birthday coupon is not accepted.",
      "Whatever I do, the voucher is turned down.",
    ),
  ),
  Topic(
    "missing part",
    (
      "The lid was not in the box.",
      "A part is missing.",
      "There was no power cable in the package.",
      "The measuring spoon that should be included is not there.",
      "I cannot put it together, one piece is absent.",
      "The filter was missing when I unpacked it.",
      "Not all parts of the list are in the box.",
      "The drip tray was not packed.",
    ),
    (
      "I counted twice, there is one part too few.",
      "Where the hose should lie, the box is empty.",
      "The manual names six parts, and I have five.",
      "Somebody forgot to pack the handle.",
    ),
  ),
  Topic(
    "cold coffee",
    (
      "The coffee is only lukewarm.",
      "My machine does not heat any more.",
      "The coffee comes out cold.",
      "The water does not get hot.",
      "My espresso is cold after a minute of heating.",
      "It brews, but not hot enough.",
      "The heating seems to be broken.",
      "Even on the highest setting my cup is barely warm.",
    ),
    (
      "This coffee is never hot.",
      "The temperature of the coffee is far too low.",
      "I have to put every cup into the microwave.",
      "Since yesterday only cool coffee runs out.",
    ),
  ),
  Topic(
    "double payment",
    (
      "I was charged two times.",
      "My card shows the payment twice.",
      "You took the money double.",
      "There are two identical charges on my account.",
      "I paid once but was billed twice.",
      "The amount was deducted two times.",
      "My bank says that you collected it twice.",
      "One order, but two payments.",
    ),
    (
      "The same sum left my account on Monday and again on Tuesday.",
      "Why did I pay two times for one machine?",
      "I see a second payment that I cannot explain.",
      "Please look at my card, the price was booked again.",
    ),
  ),
  Topic(
    "login trouble",
    (
      "I cannot log in, I forgot my password.",
      "The mail for a new password never comes.",
      "My account is locked.",
      "It says that my password is wrong.",
      "I cannot get into my account.",
      "The login page rejects me.",
      "Your page does not know my user name.",
      "I am thrown out each time I sign in.",
    ),
    (
      "I typed my password ten times, and your site still does not let me in.",
      "How do I get back in without the password?",
      "Signing in fails since the weekend.",
      "The page asks for a password that I no longer remember.",
    ),
  ),
  Topic(
    "return of a product",
    (
      "I want to send the machine back.",
      "It does not fit my kitchen, I would like to return it.",
      "How do I return it?",
      "I do not like the colour, can I give it back?",
      "I would like a return label.",
      "Please take it back, it is too big.",
      "What is the way to send it back to you?",
      "I am not happy with it and want to return it.",
    ),
    (
      "It is still packed, and I want to return it.",
      "My wife dislikes it, so it should go back to you.",
      "Where do I send it if I do not want to keep it?",
      "I tried it for two days and want to give it back.",
    ),
  ),
  Topic(
    "loud grinder",
    (
      "The grinder is very loud.",
      "It screeches when it grinds.",
      "There is a terrible noise while the beans are ground.",
      "My grinder rattles.",
      "The grinding sounds like stones.",
      "Since today the grinder howls.",
      "The mill makes a cracking noise.",
      "It grinds so loudly that my neighbours complain.",
    ),
    (
      "When the beans are milled, it sounds like a saw.",
      "The grinding wakes up the whole house.",
      "Something in the grinder clatters.",
      "The grinder whistles in a strange way.",
    ),
  ),
  Topic(
    "descaling light",
    (
      "The descaling light does not go out.",
      "I descaled it, but the light is still on.",
      "The lamp for descaling is on all the time.",
      "It wants to be descaled again and again.",
      "The descaling sign keeps blinking.",
      "After the descaling the warning stays.",
      "How do I switch off the descaling lamp?",
      "The display says descale, though I just did.",
    ),
    (
      "I descaled it twice, and still the little lamp is lit.",
      "The descaling warning will not disappear.",
      "It keeps asking me to descale.",
      "The orange lamp for descaling shines day and night.",
    ),
  ),
  Topic(
    "pause of the subscription",
    (
      "I want to pause my bean subscription.",
      "Please send no beans in July.",
      "Can my subscription rest for two months?",
      "I have too many beans, please pause the deliveries.",
      "I am on holiday and want no beans meanwhile.",
      "How do I stop the subscription for a while?",
      "Please hold my monthly beans.",
      "I would like to skip the next bags of beans.",
    ),
    (
      "My cupboard is full of your beans, please wait with the next ones.",
      "We travel until autumn, so no beans until then.",
      "Can the subscription take a break?",
      "Leave out the next two bags of my subscription.",
    ),
  ),
  Topic(
    "stale beans",
    (
      "The beans taste stale.",
      "Your beans are old.",
      "The coffee beans smell of nothing.",
      "My last bag of beans tastes musty.",
      "The beans are not fresh.",
      "These beans have lost all their taste.",
      "The bag was open and the beans are dry and flat.",
      "I think the beans are past their date.",
    ),
    (
      "The coffee from these beans tastes like cardboard.",
      "The beans have no aroma at all.",
      "The last beans you sent were flat and dusty.",
      "I opened the bag, and the beans smelled like an old cellar.",
    ),
  ),
  Topic(
    "order of a spare part",
    (
      "I need a new water filter for my machine.",
      "Where can I buy a new seal?",
      "I broke the glass jug, can I buy another one?",
      "I would like to order a spare part.",
      "Do you sell the milk hose alone?",
      "My handle broke, I want to buy a new one.",
      "I want to buy a second drip tray.",
      "Can I get the brush as a single piece?",
    ),
    (
      "The knob is lost, what does another one cost?",
      "I am looking for a new sieve that fits my model.",
      "Please sell me just the tank.",
      "How do I buy a single part?",
    ),
  ),
  Topic(
    "question about a repair",
    (
      "Is my repair finished?",
      "I sent my machine in for repair and hear nothing.",
      "How long will the repair take?",
      "You have had my machine for repair for three weeks.",
      "What is the state of my repair?",
      "When do I get my repaired machine back?",
      "Your workshop has my machine, what is going on?",
      "Has my machine been repaired yet?",
    ),
    (
      "My machine is with your mechanics, do you know more?",
      "Three weeks ago I handed it in for repair, and since then silence.",
      "What have they found out at the repair?",
      "Any news from the workshop about my machine?",
    ),
  ),
  Topic(
    "damaged on arrival",
    (
      "My machine arrived broken.",
      "It has a crack in the housing, and I just unpacked it.",
      "The glass was shattered when I opened the box.",
      "It came with a big dent.",
      "The parcel was crushed and the machine with it.",
      "The machine was scratched on arrival.",
      "It came out of the box in pieces.",
      "The door was torn off when the parcel came.",
    ),
    (
      "The courier must have dropped it, one side is bent.",
      "I opened the package and found splinters.",
      "Fresh from the box, and already broken at the corner.",
      "The front was smashed when it came.",
    ),
  ),
  Topic(
    "deletion of an account",
    (
      "Please delete my account.",
      "I want all my data erased.",
      "Remove me from your shop.",
      "How do I close my account for good?",
      "I no longer want to be your customer, delete my data.",
      "Please erase my profile.",
      "Take my name out of your files.",
      "I want my account gone.",
    ),
    (
      "Forget everything you know about me, please delete it.",
      "My profile should be deleted.",
      "I wish to leave, and no data of me may stay stored.",
      "Please wipe my customer account.",
    ),
  ),
  Topic(
    "longer warranty",
    (
      "I want to extend the warranty.",
      "Can I buy two more years of warranty?",
      "How do I get a longer warranty?",
      "My warranty ends soon, can I prolong it?",
      "Do you offer an extra warranty?",
      "I would like to add a warranty to my machine.",
      "What must I do for the five year warranty?",
      "Please make my warranty longer.",
    ),
    (
      "I would pay for one more year of warranty.",
      "The two years of warranty are nearly over, can I stay covered?",
      "Can the warranty time be stretched?",
      "I wish my warranty would last beyond next spring.",
    ),
  ),
  Topic(
    "tank that does not fit",
    (
      "The water tank does not fit.",
      "I cannot push the water tank in.",
      "The new tank is too wide for my machine.",
      "The tank does not click into place.",
      "My water tank sits loose.",
      "The water container will not go in.",
      "The tank I got does not match my machine.",
      "The tank stands out by a finger's width.",
    ),
    (
      "However I turn it, the water tank sticks out.",
      "The tank jams halfway.",
      "There is a gap between tank and machine.",
      "The tank wobbles and will not lock.",
    ),
  ),
  Topic(
    "milk that does not froth",
    (
      "The milk does not froth.",
      "I get no foam.",
      "My cappuccino has no foam on top.",
      "The milk frother does nothing.",
      "The milk stays thin.",
      "It only warms the milk, there is no froth.",
      "The frother spits instead of foaming.",
      "There are just a few bubbles in the milk.",
    ),
    (
      "My latte has no froth.",
      "The steam hisses, but the milk stays flat.",
      "Where is the foam on my cappuccino?",
      "I tried four kinds of milk, and none froths.",
    ),
  ),
  Topic(
    "business account",
    (
      "I want to open a business account.",
      "We are an office and want to order regularly.",
      "Do you supply cafés?",
      "Can our firm become a customer?",
      "I would like to register my restaurant with you.",
      "How do companies order from you?",
      "We need ten machines for our offices.",
      "Is there an account for traders?",
    ),
    (
      "I run a small hotel and would like to buy from you every month.",
      "Our school wants to become a customer.",
      "Whom do shops talk to that want to sell your goods?",
      "As a bakery, how do we open an account?",
    ),
  ),
)

# Around a customer's words, and what a customer says who does not tell at once what it is about.
FRAMES = ("{}", "Hello! {}", "Good morning. {}", "{} Please help.", "{} Thank you.")
HELD_OUT_FRAMES = ("{} Best wishes, Ida", "Hi there. {}", "One question. {}", "{} What now?")
OPENINGS = ("Hello, can you help me?", "I have a question about my order.", "Is anybody there?")
HELD_OUT_OPENINGS = ("Good evening, I need some help.", "May I ask you something?")
